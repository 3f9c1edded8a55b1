select case sorting.collname
           when 'default' then database.datlocprovider = 'b' or database.datcollate in ('C', 'POSIX')
                               and database.datlocprovider = 'c'
           else sorting.collprovider = 'b' or sorting.collcollate in ('C', 'POSIX') and sorting.collprovider = 'c'
       end and kind.typname in ('text', 'varchar') and attribute.attnotnull and not exists (
           select from pg_constraint as promise
           where promise.conrelid = attribute.attrelid and attribute.attnum = any (promise.conkey)
             and promise.contype = 'n' and not promise.convalidated
       )
from pg_attribute as attribute
join pg_type as kind on kind.oid = attribute.atttypid
join pg_collation as sorting on sorting.oid = attribute.attcollation
cross join pg_database as database
where database.datname = current_database()
  and attribute.attrelid = to_regclass($1) and attribute.attname = $2
