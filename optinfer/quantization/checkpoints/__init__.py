"""The layouts of files that others read: one module each."""
