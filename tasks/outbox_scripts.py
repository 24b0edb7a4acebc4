"""Lua scripts of the outbox, each atomic.

A server that refuses writes (no memory, a replica, no quorum) refuses a script's first write; later ones are allowed.
The only other cause of an error, a key of another type, is removed before. So a script writes everything or nothing.

The first KEYS of all scripts are the delivery, its host's pending deliveries and the hosts; the first ARGV are the
seconds that pending deliveries are kept, the host and the id.
"""

from __future__ import annotations

from . import redis_keys

#: Hosts with pending deliveries, by the time of their next attempt. Each host has its own sorted set, so that
#: deliveries to a slow host do not delay others.
HOSTS = redis_keys.DELIVERY_HOSTS.named()
DELIVERED, FAILED = redis_keys.DELIVERED.named(), redis_keys.UNDELIVERED.named()
DISABLED = redis_keys.DISABLED_URLS.named()
#: Hosts with pending deliveries, by the age of their oldest one. `ages:<host>` has a host's by the time of addition.
OLDEST = redis_keys.OLDEST_DELIVERIES.named()
#: By id: a delivery's bytes and their account. An account is the host of a pending delivery, or one of ENDED.
SIZES = redis_keys.DELIVERY_SIZES.named()
#: By account: its bytes. Also PENDING, the sum of all hosts, and GIVEN_UP, the number given up for exceeding a limit.
BYTES = redis_keys.DELIVERY_BYTES.named()
#: With blanks, since a host's name has none.
PENDING_BYTES, GIVEN_UP = " pending", " given up"

#: Note of a delivery that was given up for exceeding a limit.
GIVEN_UP_NOTE = "given up unsent: more callbacks were pending than IDEFICS_CALLBACK_MAX_PENDING_BYTES or ..._HOST_BYTES"
#: Maximum of deliveries that one call gives up or deletes; the next call continues.
AT_ONCE = 1_000

# By the server's clock: workers' clocks may differ by more than a lease.
COMMON = f"""
local hosts, oldest, sizes, bytes = prefix .. '{HOSTS}', prefix .. '{OLDEST}', prefix .. '{SIZES}', prefix .. '{BYTES}'
local ended = {{delivered = prefix .. '{DELIVERED}', failed = prefix .. '{FAILED}'}}
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local function record_of(id) return prefix .. '{redis_keys.DELIVERY.prefix}' .. id end
local function pending_of(host) return prefix .. '{redis_keys.PENDING_DELIVERIES.prefix}' .. host end
local function ages_of(host) return prefix .. '{redis_keys.DELIVERY_AGES.prefix}' .. host end

-- A key of ours with another type is nothing of ours.
local function remove_unless(readable, key, ...)
  local answer = redis.pcall(readable, key, ...)
  local is_wrong = type(answer) == 'table' and answer.err and string.find(answer.err, 'WRONGTYPE', 1, true)
  if is_wrong then redis.call('DEL', key) end
end
local function ensure_types(host, id)
  local sorted_sets = {{hosts, oldest, ended.delivered, ended.failed, prefix .. '{DISABLED}'}}
  for _, key in ipairs(sorted_sets) do remove_unless('ZCARD', key) end
  for _, key in ipairs({{sizes, bytes}}) do remove_unless('HGET', key, '') end
  if host then
    remove_unless('ZCARD', pending_of(host))
    remove_unless('ZCARD', ages_of(host))
  end
  if id then remove_unless('HGET', record_of(id), '') end
end

local function add_to(account, change)
  local sum = (tonumber(redis.call('HGET', bytes, account)) or 0) + change
  if sum > 0 then redis.call('HSET', bytes, account, sum) else redis.call('HDEL', bytes, account) end
end
local function change_bytes(account, change)
  add_to(account, change)
  if string.sub(account, 1, 1) ~= ' ' then add_to('{PENDING_BYTES}', change) end
end
-- Let a delivery count for an account, or for none. Whatever it counted for before, it counts once.
local function count(id, account, size)
  local before, from = string.match(redis.call('HGET', sizes, id) or '', '^(%d+) (.+)$')
  size = size or before
  if before and from == account and size == before then return end
  if before then change_bytes(from, -before) end
  if account and size then
    redis.call('HSET', sizes, id, size .. ' ' .. account)
    change_bytes(account, tonumber(size))
  else
    redis.call('HDEL', sizes, id)
  end
end

local function sort_in(host, ttl)
  local first = redis.call('ZRANGE', pending_of(host), 0, 0, 'WITHSCORES')
  local eldest = redis.call('ZRANGE', ages_of(host), 0, 0, 'WITHSCORES')
  if first[2] then redis.call('ZADD', hosts, first[2], host) else redis.call('ZREM', hosts, host) end
  if eldest[2] then redis.call('ZADD', oldest, eldest[2], host) else redis.call('ZREM', oldest, host) end
  for _, key in ipairs({{hosts, oldest, sizes, bytes, pending_of(host), ages_of(host)}}) do
    redis.call('EXPIRE', key, ttl)
  end
end
local function leave_pending(host, id)
  redis.call('ZREM', pending_of(host), id)
  redis.call('ZREM', ages_of(host), id)
end
"""

# Arguments: seconds to its attempt, its bytes, most bytes of a host and of all, seconds that what is given up is kept,
# fields.
# Returns whether it was added, and how many others were given up for it.
ADD = f"""
local ttl, host, id, wait, size = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local host_most, most, keep = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
ensure_types(host, id)
if redis.call('EXISTS', KEYS[1]) == 1 then return {{0, 0}} end
redis.call('HSET', KEYS[1], unpack(ARGV, 9))
redis.call('EXPIRE', KEYS[1], ttl)
redis.call('ZADD', pending_of(host), now + wait, id)
redis.call('ZADD', ages_of(host), now, id)
count(id, host, size)
sort_in(host, ttl)

local function give_up_oldest(of)
  local old = redis.call('ZRANGE', ages_of(of), 0, 0)[1]
  if not old or old == id then return false end
  leave_pending(of, old)
  if redis.call('EXISTS', record_of(old)) == 1 then
    redis.call('HSET', record_of(old), 'state', 'failed', 'note', '{GIVEN_UP_NOTE}', 'changed', now)
    redis.call('EXPIRE', record_of(old), keep)
    redis.call('ZADD', ended.failed, now, old)
    redis.call('EXPIRE', ended.failed, keep)
    count(old, ' failed')
  else
    count(old)
  end
  sort_in(of, ttl)
  return true
end
local function bytes_of(account) return tonumber(redis.call('HGET', bytes, account)) or 0 end
local given_up = 0
while given_up < {AT_ONCE} and bytes_of(host) > host_most and give_up_oldest(host) do given_up = given_up + 1 end
while given_up < {AT_ONCE} and bytes_of('{PENDING_BYTES}') > most do
  local of = redis.call('ZRANGE', oldest, 0, 0)[1]
  if not of or not give_up_oldest(of) then break end
  given_up = given_up + 1
end
if given_up > 0 then add_to('{GIVEN_UP}', given_up) end
return {{1, given_up}}
"""

# A claimed delivery is due again when its lease ends, so it is not lost if its worker is killed.
# Hosts that answered recently come last: the other hosts' shares leave attempts for them.
CLAIM = """
ensure_types()
local ttl, token, lease, plan = ARGV[1], ARGV[2], now + ARGV[3], cjson.decode(ARGV[4])
local claimed, free, known, late, due = {}, plan.free, {}, {}, {}
for _, host in ipairs(plan.answered) do known[host] = true end
for _, host in ipairs(plan.silent) do known[host] = true end

-- The calls that it may make of so many.
local function take(host, calls)
  local slots = math.min(calls, free, plan.per_host - (plan.busy[host] or 0))
  if slots <= 0 then return 0 end
  ensure_types(host)
  local ids = redis.call('ZRANGEBYSCORE', pending_of(host), '-inf', now, 'LIMIT', 0, slots * plan.each)
  for _, id in ipairs(ids) do
    local record = record_of(id)
    remove_unless('HGET', record, '')
    if redis.call('EXISTS', record) == 1 then
      redis.call('HDEL', record, 'token')
      redis.call('HSET', record, 'token', token)
      redis.call('ZADD', pending_of(host), lease, id)
      claimed[#claimed + 1] = id
    else
      leave_pending(host, id)
      count(id)
    end
  end
  sort_in(host, ttl)
  local taken = math.min(slots, #ids)
  free = free - taken
  return taken
end

local silent = {}
for _, host in ipairs(plan.silent) do silent[host] = true end
local others, silent_calls = plan.others, plan.silent_calls
for _, host in ipairs(redis.call('ZRANGEBYSCORE', hosts, '-inf', now, 'LIMIT', 0, plan.window)) do
  if others <= 0 then break end
  if not known[host] then others = others - take(host, others) end
  if silent[host] then late[#late + 1] = host end
end
for _, host in ipairs(late) do
  local taken = take(host, math.min(others, silent_calls))
  others, silent_calls = others - taken, silent_calls - taken
end
for _, host in ipairs(plan.answered) do
  local at = tonumber(redis.call('ZSCORE', hosts, host))
  if at and at <= now then due[#due + 1] = {at, host} end
end
table.sort(due, function(one, other) return one[1] < other[1] end)
for _, each in ipairs(due) do take(each[2], free) end
return claimed
"""

# Each script first writes what needs no memory: a full server refuses a script whose first write may need some, and a
# sent delivery that cannot be recorded would be sent again.
# Only the holder of the claim may settle a delivery, since another worker may have taken it over. A delivery that was
# given up meanwhile may still be marked as delivered.
# Arguments: the token, the account (empty: its host's), seconds to the next attempt, seconds that it is kept, fields.
SETTLE = """
local ttl, host, id, token, account, wait, keep = unpack(ARGV, 1, 7)
ensure_types(host, id)
if redis.call('HGET', KEYS[1], 'token') ~= token then return 0 end
local is_pending = redis.call('HGET', KEYS[1], 'state') == 'pending'
if account == '' and not is_pending then return 0 end
redis.call('HDEL', KEYS[1], 'token')
redis.call('HSET', KEYS[1], unpack(ARGV, 8))
redis.call('EXPIRE', KEYS[1], keep)
if account == '' then
  redis.call('ZADD', pending_of(host), now + wait, id)
else
  leave_pending(host, id)
  for _, key in pairs(ended) do redis.call('ZREM', key, id) end
  redis.call('ZADD', ended[account], now, id)
  redis.call('EXPIRE', ended[account], keep)
  count(id, ' ' .. account)
end
sort_in(host, ttl)
return 1
"""

# Returns 1 if it was removed, 0 if there is none, -1 if it was attempted, claimed or has ended.
REMOVE = """
local host, id = ARGV[2], ARGV[3]
ensure_types(host, id)
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local state, attempts, token = unpack(redis.call('HMGET', KEYS[1], 'state', 'attempts', 'token'))
if state ~= 'pending' or tonumber(attempts) > 0 or (token and token ~= '') then return -1 end
redis.call('DEL', KEYS[1])
leave_pending(host, id)
count(id)
sort_in(host, ARGV[1])
return 1
"""

# The batch replaces its members in one step, so that each event is in one pending delivery even after a kill.
# Arguments: the token, its lease, seconds that members are kept, its bytes, the number of members, their ids, fields.
BATCH = """
local ttl, host, id, token, lease, keep, size = unpack(ARGV, 1, 7)
local most = 8 + tonumber(ARGV[8])
ensure_types(host, id)
for index = 9, most do
  local record = record_of(ARGV[index])
  remove_unless('HGET', record, '')
  if redis.call('HGET', record, 'token') ~= token or redis.call('HGET', record, 'state') ~= 'pending' then return 0 end
end
for index = 9, most do
  local record = record_of(ARGV[index])
  redis.call('HDEL', record, 'token', 'body')
  redis.call('HSET', record, 'state', 'batched', 'batch', id)
  redis.call('EXPIRE', record, keep)
  leave_pending(host, ARGV[index])
  count(ARGV[index])
end
redis.call('HSET', KEYS[1], unpack(ARGV, most + 1))
redis.call('EXPIRE', KEYS[1], ttl)
redis.call('ZADD', pending_of(host), now + lease, id)
redis.call('ZADD', ages_of(host), now, id)
count(id, host, size)
sort_in(host, ttl)
return 1
"""

# Its age starts anew: as the oldest it would be given up at once.
REPLAY = """
local ttl, host, id, size = unpack(ARGV, 1, 4)
ensure_types(host, id)
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'state', 'pending', 'attempts', 0, 'note', 'replayed', 'changed', now)
redis.call('HDEL', KEYS[1], 'token')
redis.call('EXPIRE', KEYS[1], ttl)
for _, key in pairs(ended) do redis.call('ZREM', key, id) end
redis.call('ZADD', pending_of(host), now, id)
redis.call('ZADD', ages_of(host), now, id)
count(id, host, size)
sort_in(host, ttl)
return 1
"""

# Delete ended ones that are too old, too many or too large together, some at a time. Returns their number.
# Arguments: the state, seconds that they are kept, their maximum number, their maximum bytes.
TRIM = f"""
local account, keep, most, most_bytes = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
ensure_types()
local key = ended[account]
local function forget(id)
  redis.call('ZREM', key, id)
  redis.call('DEL', record_of(id))
  count(id)
end
local old = redis.call('ZRANGEBYSCORE', key, '-inf', now - keep, 'LIMIT', 0, {AT_ONCE})
for _, id in ipairs(old) do forget(id) end
local forgotten = #old
local excess = redis.call('ZCARD', key) - most
while forgotten < {AT_ONCE} do
  local too_large = (tonumber(redis.call('HGET', bytes, ' ' .. account)) or 0) > most_bytes
  local id = (excess > 0 or too_large) and redis.call('ZRANGE', key, 0, 0)[1]
  if not id then break end
  forget(id)
  forgotten, excess = forgotten + 1, excess - 1
end
return forgotten
"""

# Recount one host's pending deliveries.
RECOUNT_HOST = """
local ttl, host = ARGV[1], ARGV[2]
ensure_types(host)
local sum = 0
for _, id in ipairs(redis.call('ZRANGE', pending_of(host), 0, -1)) do
  local found = redis.call('HMGET', record_of(id), 'body', 'url', 'created')
  if found[1] then
    local size = string.match(redis.call('HGET', sizes, id) or '', '^(%d+) ') or (#found[1] + #found[2] + ARGV[3])
    redis.call('HSET', sizes, id, size .. ' ' .. host)
    if not redis.call('ZSCORE', ages_of(host), id) then redis.call('ZADD', ages_of(host), found[3], id) end
    sum = sum + size
  else
    leave_pending(host, id)
    redis.call('HDEL', sizes, id)
  end
end
for _, id in ipairs(redis.call('ZRANGE', ages_of(host), 0, -1)) do
  if not redis.call('ZSCORE', pending_of(host), id) then redis.call('ZREM', ages_of(host), id) end
end
if sum > 0 then redis.call('HSET', bytes, host, sum) else redis.call('HDEL', bytes, host) end
sort_in(host, ttl)
"""

# Then recount the ended ones and the sum of all hosts.
RECOUNT = f"""
ensure_types()
for account, key in pairs(ended) do
  local sum = 0
  for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do
    sum = sum + (string.match(redis.call('HGET', sizes, id) or '', '^(%d+) ') or 0)
  end
  redis.call('HSET', bytes, ' ' .. account, sum)
end
local found, all = redis.call('HGETALL', bytes), 0
for index = 1, #found, 2 do
  if string.sub(found[index], 1, 1) ~= ' ' then all = all + found[index + 1] end
end
redis.call('HSET', bytes, '{PENDING_BYTES}', all)
redis.call('EXPIRE', bytes, ARGV[1])
return all
"""
