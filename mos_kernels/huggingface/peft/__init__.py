"""Mixture-of-Space as a method of peft: configuration, layer and model, as peft names its own."""
