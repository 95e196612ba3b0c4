# Written by docs/make_stub.py from MODULES in __init__.py.
from collections.abc import Mapping, Sequence

from safeneuron._version import __version__ as __version__
from safeneuron.attacks.checkpoint import write_pruned as write_pruned
from safeneuron.attacks.jailbreaks import Attempt as Attempt
from safeneuron.attacks.jailbreaks import input_attempts as input_attempts
from safeneuron.attacks.pruning import Attack as Attack
from safeneuron.attacks.pruning import attack as attack
from safeneuron.attacks.pruning import perplexity as perplexity
from safeneuron.attacks.pruning import respond as respond
from safeneuron.config.schema import Config as Config
from safeneuron.config.toml import read_config as read_config
from safeneuron.data.pairs import mix as mix
from safeneuron.data.pairs import read_pairs as read_pairs
from safeneuron.data.prompts import read_prompts as read_prompts
from safeneuron.data.rows import Source as Source
from safeneuron.data.types import Pair as Pair
from safeneuron.data.types import Prompt as Prompt
from safeneuron.errors import InputError as InputError
from safeneuron.evaluation.capability import benchmark as benchmark
from safeneuron.evaluation.judge import Judge as Judge
from safeneuron.evaluation.judge import RefusalPhrases as RefusalPhrases
from safeneuron.evaluation.judging import make_judge as make_judge
from safeneuron.models.forward import MeasurementSettings as MeasurementSettings
from safeneuron.models.loading import load as load
from safeneuron.models.model import Model as Model
from safeneuron.models.model import Sampling as Sampling
from safeneuron.models.model import generate as generate
from safeneuron.neurons.interventions import Edit as Edit
from safeneuron.neurons.interventions import pruned as pruned
from safeneuron.neurons.interventions import recorded as recorded
from safeneuron.neurons.neuron_set import NeuronSet as NeuronSet
from safeneuron.neurons.statistics import ActivationStats as ActivationStats
from safeneuron.neurons.weights import owned_slices as owned_slices
from safeneuron.reporting.report import render_report as render_report
from safeneuron.runs.run import Run as Run
from safeneuron.selection.measurement import measure as measure
from safeneuron.selection.ranking import Ranking as Ranking
from safeneuron.selection.ranking import compare as compare
from safeneuron.selection.scores import Scores as Scores
from safeneuron.selection.scores import score as score
from safeneuron.selection.scores import select as select
from safeneuron.training.ablation import Ablation as Ablation
from safeneuron.training.ablation import Refresh as Refresh
from safeneuron.training.alignment import Alignment as Alignment
from safeneuron.training.alignment import align as align
from safeneuron.training.freezing import FreezeNeurons as FreezeNeurons
from safeneuron.training.freezing import frozen as frozen
from safeneuron.training.lora import merge_adapters as merge_adapters
from safeneuron.training.on_policy import on_policy_pairs as on_policy_pairs
from safeneuron.training.settings import TrainingSettings as TrainingSettings

MODULES: Mapping[str, Sequence[str]]
__all__: tuple[str, ...]
