"""The methods: which of a format's values each weight becomes."""
