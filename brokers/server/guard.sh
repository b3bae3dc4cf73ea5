# The broker runs under a shell that waits for two events: the exit of the broker, and the end of the shell's standard
# input, a pipe whose other end only we hold. However we exit, the pipe closes, the shell stops the broker and removes
# its folder. It has its own session, so that Ctrl-C in a terminal does not reach the broker, which is still needed for
# a clean shutdown. At last it kills its process group, itself included.
folder=$1; log=$2; shift 2
exec 3<&0
"$@" </dev/null >>"$log" 2>&1 3<&- &
broker=$!
echo $broker
(read -r _ <&3; kill $broker 2>/dev/null; sleep 3; kill -9 $broker 2>/dev/null) >/dev/null 2>&1 &
exec 3<&-
wait $broker
tail -n 3 "$log" | tr '\n' ' '
rm -rf "$folder"
kill -9 0
