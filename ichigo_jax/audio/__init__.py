"""Sound in: files to 16 kHz samples (``decode``), samples to log-mel (``log_mel``), long clips to pieces (``split``)."""
