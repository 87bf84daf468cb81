"""jaxpar trains Llama models on a mesh of devices. Start reading at `train.py`."""

__version__ = "0.1.0"
