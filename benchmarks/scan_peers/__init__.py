"""What the selective scan is measured beside, one file a peer."""
