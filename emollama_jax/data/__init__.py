"""Annotations, clip records and the pipeline that packs them."""
