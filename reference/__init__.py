"""The paper, literally (MoSELoRA, arXiv 2602.14490): slow, obvious, any float dtype, differentiated by autograd alone.

This is the oracle that every backend of mos_kernels is tested against, so it shares no code with it.

    manifold.py    the points: equations 5 to 8, exponential and logarithmic map, each as printed and smooth in signed κ
    guards.py      what keeps a vector inside the domain of a map
    routing.py     gates and load-balancing loss
    layer.py       the layer, token by token and expert by expert
    per_expert.py  the layer expert by expert, vectorised over tokens, as one would write it in eager PyTorch
    baselines.py   LoRA, HydraLoRA and mixture of LoRA
"""
