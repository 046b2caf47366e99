"""What a training step costs on a slice that nobody has rented yet: memory, arithmetic, communication, time."""
