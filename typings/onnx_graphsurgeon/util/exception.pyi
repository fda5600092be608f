class OnnxGraphSurgeonException(Exception): ...  # noqa: N818 - its name there
