"""What a training step needs and how fast it can be, read from what the compiler makes of it."""
