"""Planning a run for hardware that isn't here: does it fit, what moves, how long would it take?"""

from lm.plan.chips import CHIPS, Topology, parse_topology
from lm.plan.planning import Plan, make_plan, plan_run
from lm.plan.search import search

__all__ = ["CHIPS", "Plan", "Topology", "make_plan", "parse_topology", "plan_run", "search"]
