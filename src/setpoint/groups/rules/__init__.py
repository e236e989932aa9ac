"""How each op carries units: one small function per op, registered when this package is imported."""

import setpoint.groups.rules.attention
import setpoint.groups.rules.contract
import setpoint.groups.rules.elementwise
import setpoint.groups.rules.index
import setpoint.groups.rules.norm
import setpoint.groups.rules.recurrent
import setpoint.groups.rules.reduce
import setpoint.groups.rules.shape
import setpoint.groups.rules.spectrum
import setpoint.groups.rules.window  # noqa: F401
