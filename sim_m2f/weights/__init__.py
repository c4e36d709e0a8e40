"""Checkpoints of others: detectron2, Mask2Former, torchvision, timm, Swin and Hugging Face, in and out."""
