"""The engine and its rivals on a virtual clock, against a model of a device: nothing here touches torch."""
