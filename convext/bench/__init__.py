"""Benchmarks: whole networks beside their peers (`model`), single convolutions beside ATen's (`layers`)."""
