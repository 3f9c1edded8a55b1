select cast(current_setting('server_version_num') as integer) / 10000 as major,
       current_setting('server_version') as version, pg_is_in_recovery() as standby
