"""A network as it is and as it is deployed, in every form and under every engine there is, timed side by side."""

from fxrep.bench.door import bench
from fxrep.bench.engines import ENGINES
from fxrep.bench.forms import FORMS
from fxrep.bench.result import Bench, Row
from fxrep.bench.setting import DTYPES, Setting

__all__ = ["DTYPES", "ENGINES", "FORMS", "Bench", "Row", "Setting", "bench"]
