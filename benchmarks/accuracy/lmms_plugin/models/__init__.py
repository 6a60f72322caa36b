"""Read by lmms-eval: names for `--model`, each the module here that holds the class. Imports nothing, so it can be read without it."""

AVAILABLE_MODELS = {"entropy_prune": "EntropyPrune"}
