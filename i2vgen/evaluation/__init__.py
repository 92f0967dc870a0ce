"""How well a trained model does what it is told, measured on the drawn world."""
