"""The models: pure architectures, their initialisation and their loss. Nothing here knows of files or of training."""
