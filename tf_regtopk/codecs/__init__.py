"""Codecs: the form in which entries are written into a payload."""

from tf_regtopk.codecs.index_codecs import IndexCodec
from tf_regtopk.codecs.payload import Codec
from tf_regtopk.codecs.payload import PayloadCodec
from tf_regtopk.codecs.scattered import ScatteredCodec
from tf_regtopk.codecs.value_codecs import BFloat16
from tf_regtopk.codecs.value_codecs import Float16
from tf_regtopk.codecs.value_codecs import Float32
from tf_regtopk.codecs.value_codecs import Natural
from tf_regtopk.codecs.value_codecs import ScaledSign
from tf_regtopk.codecs.value_codecs import Uniform
from tf_regtopk.codecs.value_codecs import ValueCodec
from tf_regtopk.codecs.wire_report import WireReport

__all__ = [
    "BFloat16",
    "Codec",
    "Float16",
    "Float32",
    "IndexCodec",
    "Natural",
    "PayloadCodec",
    "ScaledSign",
    "ScatteredCodec",
    "Uniform",
    "ValueCodec",
    "WireReport",
]
