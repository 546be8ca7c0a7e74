"""msif_lab: which pretraining examples made this finetuned prediction good or bad?"""

from .curvature import *
from .data import *
from .errors import *
from .influence import *
from .models import *
from .objective import *
from .pipeline import *
from .solvers import *
from .training import *
from .validation import *
