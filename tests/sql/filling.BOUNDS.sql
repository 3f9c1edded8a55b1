select set_config('lock_timeout', '1s', true), set_config('idle_in_transaction_session_timeout', '15s', true)
