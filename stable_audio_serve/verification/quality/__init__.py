"""The quality gate: run golden requests on a loaded model and compare their audio with stored quality reports."""
