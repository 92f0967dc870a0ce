"""The moving shapes that we draw to train and judge small models, and the reading of their motion."""
