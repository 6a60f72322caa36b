"""One small file per model family (`models/`) and per target (`targets/`): data, no logic. Read by `export.configs`."""
