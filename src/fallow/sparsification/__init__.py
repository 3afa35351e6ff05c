"""Finds what may rest in a model that exists, within a budget of quality. Needs PyTorch."""
