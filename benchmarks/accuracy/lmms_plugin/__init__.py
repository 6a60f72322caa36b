"""What lmms-eval finds with `LMMS_EVAL_PLUGINS=benchmarks.accuracy.lmms_plugin`: the model `entropy_prune` and a local task."""
