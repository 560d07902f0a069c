"""How networks learn: the LightningModule, losses and optimisation."""
