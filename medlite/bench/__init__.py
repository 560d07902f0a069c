"""Latency, throughput, memory, energy and size, measured in child processes."""
