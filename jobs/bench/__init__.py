"""Benchmarks: ours and a peer in one run, on the same work, with hardware and versions beside the figures."""
