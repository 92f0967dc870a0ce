"""Training: data, losses and one loop for UNet, autoencoder and CLIP. Inference does not import it."""
