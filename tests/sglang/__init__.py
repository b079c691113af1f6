"""Rollouts on real SGLang servers on this CPU: `make sglang`, then `pytest tests/sglang`."""
