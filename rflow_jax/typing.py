"""Array aliases and the vocabulary of dimensions.

Every public array function says its shapes in these letters (checked at run time in the tests):

====  ==========================================================================
b     batch
t     text tokens (T5), or CLIP's 77 positions inside the text encoders
i     image tokens (packed latents of the image being generated)
c     condition tokens (packed latents of the image being corrected)
s     all tokens, in the order text, image, condition
n     attention heads
h     head dimension (``h2`` is half of it: rotary pairs)
d     model width
m     width of the feed-forward part
r     LoRA rank
z     latent channels (``4z`` after packing 2 x 2 patches)
====  ==========================================================================

Times follow one convention: ``t`` in [0, 1], 1 is pure noise.
"""

from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

__all__ = ["Array", "Bool", "Float", "Int", "UInt8", "UInt32"]
