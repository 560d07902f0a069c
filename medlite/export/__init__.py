"""From nn.Module to Artifact, and the proof that both agree."""
