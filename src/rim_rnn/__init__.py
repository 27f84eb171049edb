"""Recurrent Independent Mechanisms with the interface of torch.nn: write ``rim_rnn.RIM`` where ``nn.LSTM`` stood."""

from rim_rnn.cell import RIMCell as RIMCell
from rim_rnn.layer import RIM as RIM
from rim_rnn.recording import record as record

__all__ = ["RIM", "RIMCell", "record"]
__version__ = "0.1.0"
