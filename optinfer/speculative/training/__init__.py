"""Training a draft head: questions, the target's own answers to them, and what the head learns from those."""
