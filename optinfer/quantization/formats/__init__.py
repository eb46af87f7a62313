"""The formats: how a weight is stored, restored and multiplied."""
