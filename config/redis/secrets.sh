#!/bin/sh
# The secrets of a Redis and its users: `sh config/redis/secrets.sh [FOLDER [HOST...]]`, with openssl.
#
# In FOLDER (default: secrets) it makes a folder for the server, `redis`, and one for each user. Their containers mount
# them at /run/idefics. Each has a certificate by an authority of our own, and `env` with the URLs and the user's
# password. HOST (default: redis) are the server's names and addresses; the URLs contain the first.
#
# MODELS="large small" in the environment gives the users rights to these models' queues too, idefics.large and
# idefics.small. The names are kept in FOLDER/models for the next time.
#
# Existing files are kept. To renew a certificate or a password, delete it (tls.crt, password), run this again, and
# restart the server and its clients. redis/users.acl is made from its template and MODELS each time.
set -eu
umask 077

template=$(cd "$(dirname "$0")" && pwd)/users.acl.template
folder=${1:-secrets}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- redis
host=$1
names=DNS:localhost,IP:127.0.0.1
for name; do
    case $name in
        *:*) names="$names,IP:$name" ;;
        *[!0-9.]*) names="$names,DNS:$name" ;;
        *) names="$names,IP:$name" ;;
    esac
done

mkdir -p "$folder"
cd "$folder"

key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2> /dev/null
}

# certificate NAME EXTENSIONS: two years, by our authority.
certificate() {
    [ -e "$1/tls.crt" ] && return
    key "$1/tls.key"
    printf '%s\n' "basicConstraints=CA:FALSE" "$2" > extensions
    openssl req -new -key "$1/tls.key" -subj "/CN=$1" |
        openssl x509 -req -CA ca.crt -CAkey ca.key -days 730 -extfile extensions -out "$1/tls.crt" 2> /dev/null
    rm extensions
}

if [ ! -e ca.crt ]; then
    key ca.key
    openssl req -x509 -new -key ca.key -days 3650 -subj "/CN=idefics-jobs Redis" -out ca.crt
fi

models=${MODELS-$(cat models 2> /dev/null || true)}
case " $models " in
    *" callbacks "* | *[!0-9A-Za-z_.\ -]*)
        echo "MODELS: names of letters, digits, _, . and -, with blanks between them, and none of them callbacks." >&2
        exit 1 ;;
esac
echo "$models" > models

sed -e '/^[[:space:]]*#$/d' -e '/^[[:space:]]*#[^+]/d' "$template" | awk -v models="$models" '
    /^user / { if (user) print user; user = $0; next }
    sub(/^ *#\+/, "") {
        count = split(models, names)
        for (i = 1; i <= count; i++) { line = $0; gsub(/<model>/, names[i], line); user = user line }
        next
    }
    NF { sub(/^ +/, " "); user = user $0 }
    END { print user }' > users.acl

tls="ssl_cert_reqs=required&ssl_ca_certs=/run/idefics/ca.crt"
tls="$tls&ssl_certfile=/run/idefics/tls.crt&ssl_keyfile=/run/idefics/tls.key"
for user in producer worker callbacks monitor exporter; do
    mkdir -p $user
    certificate $user "extendedKeyUsage=clientAuth"
    [ -e $user/password ] || openssl rand -hex 24 > $user/password
    password=$(cat $user/password)
    hash=$(printf %s "$password" | openssl dgst -sha256 -r | cut -d ' ' -f 1)
    sed "s/#<$user>/#$hash/" users.acl > draft
    mv draft users.acl
    printf '%s\n' \
        "IDEFICS_BROKER_URL=rediss://$user:$password@$host:6379/0?$tls" \
        "IDEFICS_RESULT_BACKEND=rediss://$user:$password@$host:6379/1?$tls" > $user/env
done

# The logins of Flower and of Grafana's administrator.
mkdir -p flower grafana
[ -e flower/env ] || echo "FLOWER_BASIC_AUTH=flower:$(openssl rand -hex 16)" > flower/env
[ -e grafana/env ] || echo "GF_SECURITY_ADMIN_PASSWORD=$(openssl rand -hex 16)" > grafana/env

mkdir -p redis
# Its health check is a client.
certificate redis "extendedKeyUsage=serverAuth,clientAuth
subjectAltName=$names"
echo "REDISCLI_AUTH=$(cat monitor/password)" > redis/env
mv users.acl redis/users.acl

# The containers' users are others than the one who runs this: they may read what they mount. On this machine the folder
# itself keeps everybody else out.
for name in redis producer worker callbacks monitor exporter; do
    cp ca.crt $name/ca.crt
    chmod 755 $name
    chmod 644 $name/*
done
chmod 600 ./*/env ./*/password 2> /dev/null || true
