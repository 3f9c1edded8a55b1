select cast((select sum(numbackends) from pg_stat_database) as integer) as used,
       cast(current_setting('max_connections') as integer)
           - cast(current_setting('superuser_reserved_connections') as integer) as allowed
