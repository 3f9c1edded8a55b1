select set_config(bound.name, '15s', true)
from unnest(array['statement_timeout', 'transaction_timeout']) as bound (name)
where current_setting(bound.name, true) is not null
