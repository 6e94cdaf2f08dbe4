"""Compares a checkpoint folder with stored golden numbers, component by component and end to end."""
