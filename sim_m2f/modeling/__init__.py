"""The network: Mask2Former, which does not know how it is supervised."""

from sim_m2f.modeling.mask2former import Mask2Former, build_model, compile_maps

__all__ = ["Mask2Former", "build_model", "compile_maps"]
