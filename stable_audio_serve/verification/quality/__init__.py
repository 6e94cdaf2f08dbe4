"""The quality gate: runs golden requests on a loaded model and compares their audio with stored quality reports."""
