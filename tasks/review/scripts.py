"""Lua scripts of the review list, each atomic. Their KEYS are `KEYS` below."""

from __future__ import annotations

from .. import redis_keys

#: In the order of the names that the scripts give them.
KEYS = [
    key.named()
    for key in (
        redis_keys.REVIEW,
        redis_keys.REVIEW_DECIDED,
        redis_keys.REVIEW_UNDOABLE,
        redis_keys.REVIEW_UNSENT,
        redis_keys.REVIEW_ITEMS,
        redis_keys.REVIEW_PICTURES,
        redis_keys.REVIEW_DECISIONS,
        redis_keys.REVIEW_BYTES,
    )
]

_COMMON = """
local waiting, decided, undoable, unsent, items, pictures, decisions, bytes = unpack(KEYS)
local function size_of(id)
    local size = 0
    for _, hash in ipairs({items, pictures, decisions}) do size = size + redis.call('HSTRLEN', hash, id) end
    return size
end
local function remove(id)
    local size = size_of(id)
    for _, index in ipairs({waiting, decided, undoable, unsent}) do redis.call('ZREM', index, id) end
    for _, hash in ipairs({items, pictures, decisions}) do redis.call('HDEL', hash, id) end
    redis.call('DECRBY', bytes, size)
end
-- Decisions that cannot be undone any more need no pictures.
local function settle(before)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', undoable, '-inf', before)) do
        redis.call('DECRBY', bytes, redis.call('HSTRLEN', pictures, id))
        redis.call('HDEL', pictures, id)
        redis.call('ZREM', undoable, id)
    end
end
local function expire(ttl)
    for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ttl) end
end
"""

# Another run of a job that was decided changes nothing. Of waiting items and decisions the oldest are dropped first.
# Arguments: the id, now, the entry, the pictures, the submission, most items, most bytes, seconds that items are kept,
# the time before which decisions cannot be undone.
# Returns whether it was put on the list.
PUT = f"""{_COMMON}
local id, now, entry, copies, submitted = unpack(ARGV, 1, 5)
local max_items, max_bytes, ttl = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
if redis.call('ZSCORE', decided, id) then
    local known = redis.call('HGET', items, id)
    if known and tostring(cjson.decode(known).submitted_at) == tostring(cjson.decode(submitted)) then return 0 end
end
remove(id)
settle(ARGV[9])
for _, index in ipairs({{waiting, decided}}) do
    for _, old in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now - ttl)) do remove(old) end
end
redis.call('ZADD', waiting, now, id)
redis.call('HSET', items, id, entry)
if copies ~= '' then redis.call('HSET', pictures, id, copies) end
redis.call('INCRBY', bytes, #entry + #copies)
local function oldest()
    local first = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')
    local other = redis.call('ZRANGE', decided, 0, 0, 'WITHSCORES')
    if first[1] and (not other[1] or tonumber(first[2]) <= tonumber(other[2])) then return first[1] end
    return other[1]
end
local function is_full()
    return redis.call('ZCARD', waiting) + redis.call('ZCARD', decided) > max_items
        or tonumber(redis.call('GET', bytes) or 0) > max_bytes
end
while is_full() do
    local old = oldest()
    if old then
        remove(old)
    else
        -- A key was deleted alone.
        redis.call('SET', bytes, 0)
    end
end
expire(ttl)
return 1
"""

# Arguments: the id, now, the decision, seconds that it is kept, the time before which decisions cannot be undone,
# whether a callback is to be sent.
# Returns whether it was still to be decided.
DECIDE = f"""{_COMMON}
local id, now, decision = unpack(ARGV, 1, 3)
if redis.call('ZREM', waiting, id) == 0 then return 0 end
settle(ARGV[5])
redis.call('ZADD', decided, now, id)
redis.call('ZADD', undoable, now, id)
if ARGV[6] == '1' then redis.call('ZADD', unsent, now, id) end
redis.call('HSET', decisions, id, decision)
redis.call('INCRBY', bytes, #decision)
expire(ARGV[4])
return 1
"""

# Arguments: the id, when it was decided, when it was created.
# Returns whether it waits again.
UNDO = f"""{_COMMON}
local id, at, created = unpack(ARGV)
local found = redis.call('ZSCORE', undoable, id)
if not found or tonumber(found) ~= tonumber(at) then return 0 end
for _, index in ipairs({{decided, undoable, unsent}}) do redis.call('ZREM', index, id) end
redis.call('DECRBY', bytes, redis.call('HSTRLEN', decisions, id))
redis.call('HDEL', decisions, id)
redis.call('ZADD', waiting, created, id)
return 1
"""
