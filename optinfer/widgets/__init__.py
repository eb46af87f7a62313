"""Interactive figures: one Python class and one JavaScript module each."""
