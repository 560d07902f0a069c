"""State-space recurrences over tokens and images, each one opaque operator of torch."""
