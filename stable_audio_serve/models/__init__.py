"""Turns a model name into callable networks; the only folder that knows what a checkpoint looks like."""
