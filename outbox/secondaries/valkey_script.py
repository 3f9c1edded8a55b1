"""The scripts of a Valkey secondary: they compare, write and count in one step, so nobody sees half of an event."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from outbox.event import SyncEvent
from outbox.token import HIGHEST_POSITION

__all__ = ["APPLY", "APPLY_SHA", "HIGHEST", "RAISE", "position_of", "values_of"]

# Lua's numbers are doubles, so positions are compared as text: the longer is the higher. What no primary can have given
# is another hand's: taken for a position, a word would be above all that the primary ever gives.
_POSITIONS = b"""
local function above(one, other) return #one > #other or (#one == #other and one > other) end
local function given(held)
  local sound = held and held:match('^[1-9]%d*$') and not above(held, '9223372036854775807')
  return sound and held or '0'
end
"""
_POSITION = re.compile(rb"[1-9][0-9]{0,18}")

# A full server stops a script before it has written anything or not at all, so the highest position is written last:
# a delete, which a full server takes, must not be refused for it. Were it stopped later, every event up to there still
# stands whole. A key of another kind in an event's way is found before anything of the event is written, and is that
# event's trouble alone.
APPLY = (
    _POSITIONS
    + b"""
local function keep(resource, field, value)
  if value == '' then redis.call('HDEL', resource, field) else redis.call('HSET', resource, field, value) end
end
local function failed(answer) return type(answer) == 'table' and answer.err end
local function foreign(answer) return failed(answer) and answer.err:find('WRONGTYPE', 1, true) end
local function list(index, id, content)
  if content == '' then return redis.pcall('ZREM', index, id) else return redis.pcall('ZADD', index, 0, id) end
end
local outcomes = {}
local before = given(redis.call('HGET', KEYS[1], 'position'))
local highest = before
for n = 1, (#KEYS - 1) / 2 do
  local resource, index = KEYS[2 * n], KEYS[2 * n + 1]
  local id, position, content, version, fhir_version = unpack(ARGV, 5 * n - 3, 5 * n + 1)
  local held = redis.pcall('HGET', resource, 'position')
  local fresh = not failed(held) and above(position, given(held))
  local listed = fresh and list(index, id, content)
  if foreign(held) or foreign(listed) then
    outcomes[n] = -1
  elseif failed(held) or failed(listed) then
    return failed(held) and held or listed
  elseif not fresh then
    outcomes[n] = 0
  else
    keep(resource, 'content', content)
    keep(resource, 'version', version)
    keep(resource, 'fhir_version', fhir_version)
    redis.call('HSET', resource, 'position', position)
    if content == '' then redis.call('PEXPIRE', resource, ARGV[1]) else redis.call('PERSIST', resource) end
    if above(position, highest) then highest = position end
    outcomes[n] = 1
  end
end
if highest ~= before then redis.call('HSET', KEYS[1], 'position', highest) end
return outcomes
"""
)
APPLY_SHA = hashlib.sha1(APPLY, usedforsecurity=False).hexdigest()

HIGHEST = (
    _POSITIONS
    + b"""
local highest = '0'
for _, resource in ipairs(KEYS) do
  local position = given(redis.call('HGET', resource, 'position'))
  if above(position, highest) then highest = position end
end
return highest
"""
)

# `walked` says that nothing was written before the highest position was kept, or that it was looked at.
RAISE = (
    _POSITIONS
    + b"""
if above(ARGV[1], given(redis.call('HGET', KEYS[1], 'position'))) then
  redis.call('HSET', KEYS[1], 'position', ARGV[1])
end
redis.call('HSET', KEYS[1], 'walked', 1)
return given(redis.call('HGET', KEYS[1], 'position'))
"""
)


def values_of(event: SyncEvent) -> Iterator[bytes]:
    """Yield what the script takes for an event."""
    assert event.position is not None, "only a recorded event has a position to compare"
    yield event.resource_id.encode()
    yield str(event.position).encode()
    # Empty stands for absent: none of the three can be empty text.
    for value in (event.content, event.version, event.fhir_version):
        yield (value or "").encode()


def position_of(held: bytes | None) -> int:
    """Return the position in a field, as the scripts take it: 0 for what no primary can have given."""
    position = int(held) if held and _POSITION.fullmatch(held) else 0
    return position if position <= HIGHEST_POSITION else 0
