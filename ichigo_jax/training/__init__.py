"""What a training run consists of, whatever it trains: its config, state, optimizer, checkpoints and metrics."""
